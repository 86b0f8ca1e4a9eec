"""Backfold beside its rivals: the same start, images, steps and learning rates; see `race.race`."""
