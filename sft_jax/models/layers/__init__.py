"""The layers of a block: projections and the mixers beside attention.

In: activations [B, T, C] and segment ids [B, T]; out: activations. A mixer
never carries anything from one document of a row into the next.

Reading order: `linear`, `short_conv`, `recurrence`, `mixers`;
`grouped` (the product of experts).
"""
