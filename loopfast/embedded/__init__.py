"""The embedded model: a tiny Stable Diffusion, the world it draws, its reward and its pretraining recipe."""
