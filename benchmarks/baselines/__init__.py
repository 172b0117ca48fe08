"""What the kernels are compared with: NG-GNN on PyTorch Geometric, eager and compiled."""
