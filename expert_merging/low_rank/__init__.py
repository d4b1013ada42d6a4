"""Methods that merge LoRA adapters by their factors, without ever decomposing a matrix of the model's own size."""
