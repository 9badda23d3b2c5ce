"""Pages that load nothing and run nothing: of a run, of several, of an audit.

In come plain values as the files of a workdir hold them; out comes one HTML
file. Templates (*.html.jinja) hold the HTML, the modules what they show: read
elements (escaping, tables, marked differences), charts (inline SVG), figures
(tables), replies, run_page, compare_page, audit_page.
"""
