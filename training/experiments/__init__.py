"""The experiments of the paper (Sandler et al. 2018), each by one command: `python -m training.experiments NAME`.

`options.py` has the settings, `results.py` keeps rows as they are measured, and `variants.py` trains networks that
differ in their blocks. The others are an experiment each: `manifold.py`, `cost.py`, `expansion.py` and `ablation.py`.
"""
