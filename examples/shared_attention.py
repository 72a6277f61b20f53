"""The kernels alone: attention in which rows of a batch share maps, and the same from PyTorch's attention."""

import torch
from torch.nn import functional as F

from fpe_kernels import backends, shared_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
query, key = torch.randn(2, 2, 8, 256, 40, device=device)  # two maps: [G, H, N, D]
value = torch.randn(4, 8, 256, 40, device=device)  # four rows: [B, H, N, D]
rows = [0, 0, 1, 1]  # rows 0 and 1 have map 0, rows 2 and 3 map 1

out = shared_attention(query, key, value, map_index=rows)
plain = F.scaled_dot_product_attention(query[rows], key[rows], value)
torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)

for name, answer in backends().items():
    print(f"{name}: {answer}")
print(f"{tuple(out.shape)}, at most {(out - plain).abs().max():.1e} from PyTorch's attention of gathered rows")
