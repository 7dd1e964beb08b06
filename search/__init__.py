"""How a trial is run, and the program.

The way of a trial: definition -> claim -> suggest -> train -> report -> finish -> query. It can be followed from
`worker.work` to `objective.run` to `training.train`. Only the trainer process (`search.trainer`) imports Keras.
"""
