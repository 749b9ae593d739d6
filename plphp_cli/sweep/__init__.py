"""`plphp sweep`: many settings over many prompts, one prefill per prompt."""
