"""Programs compiled ahead of time for TPUs that are not here, and what XLA's compiler says of
them: memory, loops, copies, collectives and estimated cycles. Estimates are no times."""
