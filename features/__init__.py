"""Filter bank: a block of grey values in, features per voxel out; knows arrays and sigmas only."""
