"""Questions with known answers: multiple choice by likelihood, and exact match of generated replies."""
