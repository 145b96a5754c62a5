"""The page that `python -m runtime report` writes: its facts, its placements, and the HTML.

page.html is the template, page.css its style, charts.js and page.js its script: all end up in the one file.
"""
