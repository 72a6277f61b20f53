"""What sampling with diffusers' pipeline takes and gives, and what happens in between."""
