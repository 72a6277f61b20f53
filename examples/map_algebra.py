"""Maps as operators: what is written down is computed when it is multiplied, and no map is ever stored."""

import torch

from fpe_kernels import AttentionMap, blend, join

query, key, value = torch.randn(3, 1, 8, 256, 40)  # [B, H, N, D]
other_query, other_key, other_value = torch.randn(3, 1, 8, 256, 40)
source, target = AttentionMap(query, key), AttentionMap(other_query, other_key)

# The source's map in the left half of a picture of 16 × 16 pixels, the target's own in the right half.
left = (torch.arange(256) % 16 < 8).float()
edited = blend(left, source, target)
out = edited @ other_value  # [1, 8, 256, 40]

# The adjoint, and a few entries: which queries look at the pixel in the middle?
weights = edited.T @ torch.ones_like(other_value)
middle = edited.columns([8 * 16 + 8])  # [1, 8, 256, 1]

# One softmax over the keys of both: what a layer gives whose keys are concatenated.
both = join([AttentionMap(query, key), AttentionMap(query, other_key)])
together = both @ torch.cat([value, other_value], dim=2)
whole = AttentionMap(query, torch.cat([key, other_key], dim=2)) @ torch.cat([value, other_value], dim=2)
torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-5)

# Gradients go through all of it.
query.requires_grad_()
(blend(left, AttentionMap(query, key), target) @ other_value).square().mean().backward()
print(f"out {tuple(out.shape)}, middle {tuple(middle.shape)}, weights {tuple(weights.shape)}")
print(f"gradient of the query: {query.grad.norm():.3g}")
