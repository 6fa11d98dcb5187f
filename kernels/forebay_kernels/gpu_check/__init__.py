"""`make gpu-check`: everything that needs a GPU, in one command of at most ten minutes.

    python -m forebay_kernels.gpu_check [--device cpu] [--fresh] [--only PHASE]
                                         [--journal FILE] [--results FOLDER]

Phases (`phases.py`): build, ceilings, correctness, speed, compute-sanitizer, ncu. Each runs in a
process of its own under a deadline of its own and appends rows to the journal as it goes; a run
takes up what an earlier one with the same sources, device and driver left. What the machine lacks
becomes a row that says so. At the end come a table and, on a GPU, the rows of kernels/RESULTS.md.

`--device cpu` puts the same code over tiny shapes on the CPU: a rehearsal of the plumbing, whose
times say nothing about a GPU and are never written to RESULTS.md. Exit status: 0 all done and
right, 1 something failed or was not reached, 3 no GPU.
"""
