"""Training with Lightning. fit.py trains any objective on any data set; run.py and prepare.py make
both from an experiment's YAML. module.py is the one LightningModule, around an objective.

checkpoints.py, saving.py and record.py keep a run whole through kills and refuse what would change
it; validation.py exports and evaluates; sharding.py is FSDP2; plan.py and costs.py estimate memory
and time. Objectives train in a bare loop, too.
"""
