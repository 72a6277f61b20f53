"""The pictures that the embedded model is trained on and judged by: drawn, worded, of any size."""
