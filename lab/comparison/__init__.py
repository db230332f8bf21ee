"""Comparison: a model as it is beside the same model with mechanisms on, and what changes inside.

report = lab.compare(model, {"MoD": MixtureOfDepths(keep=0.2)}, items)
report.save("out/compare")            # report.html, a file for every Result, recipe.yaml
"""

from lab.comparison.comparing import compare
from lab.comparison.recipes import CompareRecipe
from lab.comparison.reports import Report

__all__ = ["CompareRecipe", "Report", "compare"]
