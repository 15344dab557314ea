"""The shipped world model behind Ray Serve: requests take turns on one compiled transformer, and each is what it is alone.

| file | what |
|---|---|
| `messages.py` | requests and replies: what is asked, what is refused, how frames are sent |
| `models.py` | the compiled transformer of each task: from files that `hero_fx.save` wrote, or compiled at the start |
| `engine.py` | one model in one process: trajectories that take turns step by step, and end when nobody waits for them |
| `metrics.py` | counts as Prometheus reads them |
| `answers.py` | from a request over HTTP to its answer, and the status of each failure |
| `deployment.py` | the two Ray deployments: `Front` speaks HTTP, `World` has the model |
| `arrivals.py` | Poisson arrivals, and what is measured of their requests |
| `artifact.py`, `app.py`, `load.py` | the commands: save the model, serve it, load the server |

`messages.py`, `models.py`, `engine.py` and `arrivals.py` know nothing of Ray.
"""
