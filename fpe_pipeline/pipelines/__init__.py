"""`FreePromptPipeline`, and what it is around any UNet, on SDXL and on each family of transformers."""
