"""Scripts around the project: conversion, training of the embedded model, goldens."""
