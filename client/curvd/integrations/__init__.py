"""Remote operators as those of other libraries, one module for each library.

Each module needs its library, so nothing is imported here. They see of curvd what any user
of an operator sees.
"""
