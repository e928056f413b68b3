"""From logits to tokens.

- ``params``: :class:`SamplingParams` of a request, and log-probabilities.
- ``sampler``: the choices of one request.
- ``greedy``: acceptance of drafts that weren't sampled; ``rejection``: of drafts that were.
- ``proposal``: how a drafter samples, and from which distributions.
- ``distribution``: penalties, filters and the choice of a token; ``random_numbers``: its random numbers.
"""
