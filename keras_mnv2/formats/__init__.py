"""Models as files for other runtimes: the export, its steps, and predictions by these runtimes."""
