"""What both trainings stand on: files, checkpoints, processes, interrupts."""
