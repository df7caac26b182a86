"""``lalora reproduce``: the paper's questions under true per-sample DP, as data (presets), runs, tables and figures."""
