package lab

// Remains lets the tests ask what a closed lab left.
var Remains = remains
