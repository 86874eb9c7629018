"""The report of a run: one self-contained HTML page, and the small record that `status` prints. Imports neither torch nor transformers."""
