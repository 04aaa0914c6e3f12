"""The report of one run, `report.html` and its pictures.

artefacts.py reads what the run left, sections.py (with rows.py and agreement.py) writes the page's sections in their
order, charts.py and html.py draw what they contain, elements.py counts, and report.py puts the page together.
"""
