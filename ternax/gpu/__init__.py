"""What a GPU that is at hand for minutes is asked, each question a step in a process of its own.

`schedule` shares out the minutes and runs the steps, `record` makes their Records, `goals`
says what was found beside what was to be reached; all other modules are steps.
"""
