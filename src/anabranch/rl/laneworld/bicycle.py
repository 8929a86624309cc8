"""How a car moves: the kinematic bicycle, whose middle lies between its axles."""
# Shapes: W cars

from __future__ import annotations

import math

import numpy as np

__all__ = ["ACCELERATE", "BRAKE", "HALF_BASE", "STEER", "drive"]

# Metres from the middle to an axle; the greatest angle of the wheels; metres a second squared.
HALF_BASE, STEER = 1.4, math.radians(35)
ACCELERATE, BRAKE = 3.0, 6.0


def drive(pose_W4: np.ndarray, action_W2: np.ndarray, dt: float) -> np.ndarray:
    """x, y, heading and speed after ``dt`` seconds.

        beta = atan(tan(delta) / 2)        x' = v cos(psi + beta)        y' = v sin(psi + beta)        psi' = v sin(beta) / 1.4 m

    ``action_W2``: steering from -1 (35 degrees to the right) to 1, and from -1 (braking at 6 m/s^2) over 0 (rolling) to 1 (3 m/s^2 faster).
    With the wheels turned it drives a circle of radius 1.4 m / sin(beta). It does not drive backwards.
    """
    x_W, y_W, heading_W, speed_W = pose_W4.T
    slip_W = np.arctan(0.5 * np.tan(action_W2[:, 0] * STEER))
    pedal_W = action_W2[:, 1]
    accel_W = np.where(pedal_W >= 0, ACCELERATE * pedal_W, BRAKE * pedal_W)
    return np.stack(
        [
            x_W + speed_W * np.cos(heading_W + slip_W) * dt,
            y_W + speed_W * np.sin(heading_W + slip_W) * dt,
            heading_W + speed_W / HALF_BASE * np.sin(slip_W) * dt,
            np.maximum(speed_W + accel_W * dt, 0.0),
        ],
        axis=1,
    )
