"""Several processes that train together: torchrun starts them, torch.distributed carries what they exchange."""
