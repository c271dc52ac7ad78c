"""Plain PyTorch: the definition of every op, on any device, differentiable by autograd."""
