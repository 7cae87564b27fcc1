"""Room evaluate: how good a model is: bits per byte, exactly graded tasks, lm-eval, paired comparisons."""
