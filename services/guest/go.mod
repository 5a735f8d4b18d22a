module github.com/compute-bridge/compute-bridge/services/guest

go 1.26.0
