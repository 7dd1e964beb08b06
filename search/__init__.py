"""How a trial is run, and the program.

The path of a trial: definition -> claim -> suggest -> train -> report -> finish -> result. Follow it from
`worker.work` to `objective.run` to `training_loop.train`. Only the trainer process (`trainer_process`) imports Keras.
"""
