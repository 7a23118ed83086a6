"""Parts that several families of models share: the head's interface, straight-through gradients."""
