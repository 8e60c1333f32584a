"""One file per step of a lesson's road. Plain functions and classes: nothing here knows Ray."""
