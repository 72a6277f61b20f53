"""One attention layer with an order: the smallest thing that an edit acts on."""

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from fpe_pipeline.edits.products import plan_products
from fpe_pipeline.models.sites import Site
from fpe_pipeline.session.layers.instructions import Order
from fpe_pipeline.session.processors.unet import EditAttnProcessor

GRID = (3, 4)


def attention(seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    attn = Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **config}).to(dtype).eval()
    for parameter in attn.parameters():  # norms that start as identities would hide errors
        nn.init.normal_(parameter, std=0.5)
    return attn


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def order(attn, products, rows=6, grid=GRID, backend="torch"):
    kind = "cross" if attn.is_cross_attention else "self"
    site = Site("mid_block.attentions.0", "mid", kind, 0, attn.heads, 0, (), grid)
    return Order(site, plan_products(products, rows), backend)


def install(attn, products, **kwargs):
    """Wrap the layer's processor and give it an order."""
    attn.processor = EditAttnProcessor(attn.processor)
    attn.processor.order = order(attn, products, **kwargs)
    return attn


@torch.no_grad()
def run(attn, hidden_states, **kwargs):
    return attn(hidden_states, **kwargs)
