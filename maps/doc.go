// Package maps is the map manager: one typed owner for each map of the data plane, the ring builder and the hash as Go
// computes them, the reconciliation of a wanted configuration against what the maps hold, epochs, sweep and expiry.
//
// A Set is the typed view of the maps; whoever has one may read. A Manager is the one writer.
package maps
