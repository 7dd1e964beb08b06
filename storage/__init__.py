"""Where everything is kept: the database, who holds which trial, and a trial's files.

This room knows neither Keras nor what a study searches. ``search`` -> ``studies`` -> ``storage``: it imports
neither of the other two.
"""
