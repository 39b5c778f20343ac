"""The embedded model: a tiny Stable Diffusion, the world it draws and its reward."""
