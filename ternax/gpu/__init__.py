"""What a GPU that is at hand for minutes is asked, each question a step in a process of its own.

`schedule` shares out the minutes and runs the steps, `made` is what they get and how they tell,
`goals` what was to be reached, `screen` what was found; `contenders` and `torch_peer` are who
multiplies, all other modules are steps.
"""
