"""The papers' formulas of a flow that is followed from an image to its noise, written out."""

from itertools import pairwise

import torch

__all__ = ["path_to_noise"]


def path_to_noise(start, velocity, sigmas, solver):
    """The latents at every node, the image's first [steps + 1, ...].

    Args:
        start: latents of the image, at sigma 0.
        velocity: v(z, sigma).
        sigmas: of the nodes, noisiest first, as a scheduler has them.
        solver: "euler", "rf-solver" or "fireflow".
    """
    z, found, carried = start, [start], None
    for now, then in pairwise(sigmas.flip(0)):
        width = then.double() - now.double()
        if solver == "euler":
            z = z + width * velocity(z, now)
        else:
            first = velocity(z, now) if carried is None else carried
            middle = velocity(z + width / 2 * first, (now + then) / 2)
            z, carried = z + width * middle, middle if solver == "fireflow" else None
        found.append(z)
    return torch.stack(found)
