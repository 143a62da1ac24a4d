"""DDP fine-tuning on energies, forces, stress and relaxed structures."""
