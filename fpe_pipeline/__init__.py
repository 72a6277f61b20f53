"""Text-guided image editing on diffusers pipelines, with fused attention-map replacement."""
