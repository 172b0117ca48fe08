"""The ops in Triton: one evaluator of the edge expression, one back-propagator, and the consumers over them.

    lower.py       a program as the constants that kernels are specialised by
    blocks.py      the blocks of a graph; plan.py: as tiles of edges, groups of launches and ordered sums
    sizes.py       sizes of tiles and numbers of warps, measured ones among them; launch.py: options of launches
    tiles.py       a launch's table of blocks, and the edges of a tile
    edge_math.py   activations, Fourier features, the tabulated curve
    evaluator.py   forward through an expression; backprop.py (linear_back.py, encoder_back.py): the way back
    rows.py        sums of a tile by destination and by source
    messages.py    messages, running statistics, gradients of the reductions; attention.py: online softmax and the way back
    nodes.py       node terms before the edges, and their gradients after
    fold.py        partial results of tiles, summed in the order of the tiles
    table.py       gradient of the encoder's table
    aggregate.py, evaluate.py, attend.py, gradient_kernel.py, gradients.py: the kernels and their launches
    node_map.py, node_map_back.py: the node side of PNA

Node terms are projected once a node, before the kernels: a Triton program cannot keep a panel of them in shared
memory from tile to tile, and would repeat the products for every tile.

Pairs: where the program reads partners (the same pair, the other way about), a tile has two tuples of registers, evaluated side by side; an
update reads both. Sparse blocks come as lines of up to 16 edges of one destination, so that a tile has the same shape as a dense one's.
"""
