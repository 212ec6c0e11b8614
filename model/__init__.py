"""The mathematics and the checkpoint: DiT, VAE, diffusion, rectified flow, samplers. Imports nothing else of this project."""
