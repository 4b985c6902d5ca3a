"""What outlives a process: training states (`training`) and finished models (`models`)."""
