"""The losses of the made-up program: a smooth curve that depends on the seed."""


def loss_at(seed, step):
    return 2.5 + 2.0 / (1 + step) + 0.01 * (seed * 2654435761 % 97) / 97
