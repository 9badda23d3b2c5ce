"""What a run says: records, progress, the report, and copies for trackers.

In come metrics of steps, measurements and the files of a workdir; out go
metrics.jsonl, lines of the terminal, report.html and other pages.
Reading order: metrics, throughput, trackers (a record and its copies);
terminal, final_summary (what is printed); run_files, html (what is drawn).
"""
