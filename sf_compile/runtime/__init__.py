"""What happens at a call beside computing: CUDA graphs, and what an error says."""
