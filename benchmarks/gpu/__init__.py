"""What a GPU answers in a quarter of an hour: does every kernel run and agree, how fast is it, what can be trained.

    python -m benchmarks.gpu smoke        does every kernel run and agree? ten ratios, an edited step
    python -m benchmarks.gpu full         the rest of correctness, tuning, kernels, edits, recordings, memory
    python -m benchmarks.gpu train        a list of models, resumable
    python -m benchmarks.gpu programs     without a GPU: compile ahead what they launch, for a chip that is not here

A session (:mod:`.session`) runs stages (:mod:`.stages`), each in a process and a time of its own. What a stage finds
out it says line by line (:mod:`.records`), and the session writes each line at once: whatever happens to the stage,
what it had found stays, what it was at is named, and the exit status says that something is wrong. Inside a stage, work
that may hang or die is shared out over worker processes (:mod:`benchmarks.workers.pool`) which are replaced.
"""
